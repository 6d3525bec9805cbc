"""From raw text to training batches.

The way of the data: `readers` streams documents out of JSON lines, `tokenizers` makes ids of them,
`preprocess` runs both over many cores into the `.bin`/`.idx` pair of `indexed` (Megatron's format,
see `index_layout`) with a description beside it (`sidecar`).  `pair` opens one with the checks that are
cheap, `provenance` sees that tokenizers agree.  `merging` joins pairs, `inspection` looks through one.
`order` says which sample comes at which position of a run, and `batches` cuts the samples out of the
pairs.  Only `batches` imports torch, so that preprocessing starts at once.
"""
