#define MSDA_ISA avx2
#include "kernels.h"
