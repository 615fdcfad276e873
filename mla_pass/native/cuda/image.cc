#include "image.h"

namespace mla_pass::cuda {

#ifdef MLA_PASS_FATBIN

// By the assembler: a compiler takes minutes over an array of that size.
asm(R"(
  .pushsection .rodata
  .balign 64
mla_pass_fatbin:
  .incbin ")" MLA_PASS_FATBIN R"("
mla_pass_fatbin_end:
  .popsection
)");

extern "C" __attribute__((visibility("hidden"))) const unsigned char mla_pass_fatbin[], mla_pass_fatbin_end[];

Image image() {
  return {mla_pass_fatbin, static_cast<std::size_t>(mla_pass_fatbin_end - mla_pass_fatbin), MLA_PASS_CUDA_CAPABILITIES,
          MLA_PASS_CUDA_TOOLKIT};
}

#else

Image image() { return {nullptr, 0, "", ""}; }

#endif

}  // namespace mla_pass::cuda
