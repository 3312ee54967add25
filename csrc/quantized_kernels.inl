// The kernels of one instruction set for all quantised weights. To be included after the other quantized_*.inl.

template <Kind kKind>
constexpr Kernel few_kernel(const char* name) {
    return {name, few_block_bytes<kKind>, few_pack<kKind>, few_rows<kKind>};
}

template <Kind kKind>
constexpr Kernel many_kernel(const char* name) {
    return {name, many_block_bytes, many_pack<kKind>, many_rows<kKind>};
}

struct Choice {
    Kernel few, many;
};

#define MOERT_QUANTIZED_KERNELS(isa)                                                             \
    const Choice kChoices[] = {                                                                  \
        {few_kernel<Kind::kInt8>(isa " int8"), many_kernel<Kind::kInt8>(isa " int8, many")},     \
        {few_kernel<Kind::kInt4>(isa " int4"), many_kernel<Kind::kInt4>(isa " int4, many")},     \
        {few_kernel<Kind::kInt4Zeros>(isa " int4 with zeros"),                                   \
         many_kernel<Kind::kInt4Zeros>(isa " int4 with zeros, many")},                           \
        {few_kernel<Kind::kMxfp4>(isa " mxfp4"), many_kernel<Kind::kMxfp4>(isa " mxfp4, many")}, \
        {{isa " fp8", fp8_block_bytes, fp8_pack<false>, fp8_few_rows},                           \
         {isa " fp8, many", fp8_block_bytes, fp8_pack<true>, fp8_many_rows}},                    \
    }

const Kernel* select_quantized(const Choice (&choices)[5], const Matrix& w, int64_t tokens) {
    const Choice* choice = nullptr;
    if (w.format == Format::kInt8) choice = &choices[0];
    if (w.format == Format::kInt4) choice = &choices[w.zeros == nullptr ? 1 : 2];
    if (w.format == Format::kMxfp4) choice = &choices[3];
    if (w.format == Format::kFp8) choice = &choices[4];
    if (choice == nullptr) return nullptr;
    return tokens <= kFewTokens ? &choice->few : &choice->many;
}
