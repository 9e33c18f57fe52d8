// The row loops in plain vector extensions: whatever the target's baseline has (SSE2, NEON).
#define OPRD_KERNELS kPortable
#define OPRD_KERNELS_NAME "portable"
#include "kernels.inl"
