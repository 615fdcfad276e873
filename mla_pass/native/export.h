// Symbols that others may call; everything else is hidden.
#pragma once

#define MLA_PASS_EXPORT extern "C" __attribute__((visibility("default")))
