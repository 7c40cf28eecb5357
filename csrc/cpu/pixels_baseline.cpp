#define DIFFMF_ISA baseline
#include "pixels_kernels.h"
