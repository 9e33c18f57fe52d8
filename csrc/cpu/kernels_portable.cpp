// The row loops in plain vector extensions, for the target's baseline (SSE2, NEON).
#define OPRD_KERNELS kPortable
#define OPRD_KERNELS_NAME "portable"
#include "kernels.inl"
