#define MSDA_ISA portable
#include "kernels.h"
