#define DIFFMF_ISA baseline
#include "scan_kernels.h"
