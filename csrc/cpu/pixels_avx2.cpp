#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with -mavx2 -mfma -mf16c"
#endif
#define DIFFMF_ISA avx2
#include "pixels_kernels.h"
