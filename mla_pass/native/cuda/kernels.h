// All kernels, for whoever makes functions of kernels.def of them.
#pragma once

#include "absorb.cuh"
#include "append.cuh"
#include "attend.cuh"
#include "carry.cuh"
#include "combine.cuh"
#include "decode.cuh"
#include "expand.cuh"
#include "fix.cuh"
#include "map.cuh"
#include "setup.cuh"
