// The kernel tables of this build, and which of them this processor can run.
#pragma once

#include "kernels.h"

namespace sage {

// Tables from the plainest to the fastest; `index` counts from 0. Null behind the last.
const KernelTable* kernel_table(int index);

// Whether the processor has what the table needs.
bool is_supported(int index);

}  // namespace sage
