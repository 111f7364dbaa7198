"""Preparation of data: the recall world, as arrays and as real clips with questions. Clips need the `av` extra.

`world` (what happens in a clip) and `questions` are plain Python; `arrays` draws them with torch, for files (`render`,
`encode`, `manifests`) and for training without files.
"""
