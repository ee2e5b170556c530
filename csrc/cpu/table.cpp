// One table of this ISA's kernels; compiled once an ISA, with SAGE_ISA as its namespace.
#include "kernels.h"

#define SAGE_TEXT_OF(name) #name
#define SAGE_TEXT(name) SAGE_TEXT_OF(name)

namespace sage::SAGE_ISA {

void pack(const PackArgs&, Team&);
void pack_int(const PackIntArgs&, Team&);
void quantize(const QuantizeArgs&, Team&);
void unpack_rows(const UnpackRowsArgs&, Team&);
void linear(const LinearArgs&, Team&);
void attention(const AttentionArgs&, Team&);
void write_cache(const CacheWriteArgs&, Team&);
void norm(const NormArgs&, Team&);
void rotary(const RotaryArgs&, Team&);
void rotate_and_cache(const RotateAndCacheArgs&, Team&);
void layer_norm(const LayerNormArgs&, Team&);
void activate(const ActivationArgs&, Team&);
void soft_cap(const SoftCapArgs&, Team&);
void add(const AddArgs&, Team&);
void argmax(const ArgmaxArgs&, Team&);
void sample(const SampleArgs&, Team&);
void gather(const GatherArgs&, Team&);

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFastFma = true;
#else
constexpr bool kFastFma = false;
#endif

extern const KernelTable table;
const KernelTable table = {SAGE_TEXT(SAGE_ISA),
                           kFastFma,
                           pack,
                           pack_int,
                           quantize,
                           unpack_rows,
                           linear,
                           attention,
                           write_cache,
                           norm,
                           rotary,
                           rotate_and_cache,
                           layer_norm,
                           activate,
                           soft_cap,
                           add,
                           argmax,
                           sample,
                           gather};

}  // namespace sage::SAGE_ISA
