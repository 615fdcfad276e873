// One execution of LatentAttention, whatever runtime it was called from.
#pragma once

#include "contract.h"

namespace mla_pass {

// Somebody's threads. `run` calls task(user, i) once for each i below count and returns when all are done.
struct Threads {
  void* self;
  void (*run)(void* self, std::size_t count, void (*task)(void* user, std::size_t i), void* user);
  Index workers;  // about as many may run at a time; work is cut into more pieces than that
};

// How scores and values are computed: the cheaper by count, or always one of the two.
enum class Form { counted, absorbed, expanded };

// What the environment variable MLA_PASS_FORM says, for comparing the two; throws Refused when it says anything else.
Form form_from_environment();

struct Outputs {
  void* context;         // [B, S, H * value_dim]
  void* present_latent;  // [B, 1, capacity, r]; may be the past's own memory
  void* present_rope;    // [B, 1, capacity, p]; the same
};

// Bytes of past rows copied to a present that is not the past itself, in this process.
std::uint64_t copied_bytes();

// Writes the new rows and the context. `size` is what `checked` returned for these inputs.
template <class T>
void run(const Layout& layout, const Sizes& size, const Inputs& inputs, const Outputs& outputs, const Isa& isa,
         Form form, const Threads& threads);

}  // namespace mla_pass
