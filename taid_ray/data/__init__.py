"""Training data, from documents to batches: reading, chat templates, tokens, packed rows, global batches. Free of Ray.

Others use `store/` (encoded data, read in one global order), `dataset` (TrainingData, the order of blocks; validation_rows),
`cursor`, `batch` (Batch, Row, collate), `batching` (split_evenly, num_micro_batches), `encoding.Encoder`,
`documents.open_documents`, `shared_ids.check_ids` and `run_images.RunImages` (reads the images of rows).
`reading/` has the readers of files, below `documents`.
Below `encoding`: `messages` reads conversations, `chat` renders, `turns` finds the answers in what
was rendered, `visibility` whether anything is missing there, and `answers` puts these together. With images, `images` reads
what stands in a row; in a message one character stands for each until `chat` renders it, and `expansions` puts all tokens of an
image in the place of the one that the template wrote.

Traps:
- Local files never go through the library datasets: it guesses types from the first rows, and keeps old files in a cache.
- Global batch n is a function of (seed, n) alone, in either order. The number of its loss tokens is known everywhere without a
  collective: from the store's index, or, in blocks, because every rank reads the whole of it.
- Padding uses id 0 and continues position_ids; packed documents restart them. No attention mask is ever passed.
"""
