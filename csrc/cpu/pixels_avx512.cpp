#if !defined(__AVX512F__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
#endif
#define DIFFMF_ISA avx512
#include "pixels_kernels.h"
