// The row loops for x86-64 with AVX2, FMA and F16C, selected at run time if all three exist.
#define OPRD_KERNELS kAvx2
#define OPRD_KERNELS_NAME "avx2"
#include "kernels.inl"
