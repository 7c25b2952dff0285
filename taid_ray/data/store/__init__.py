"""The store: training data that are encoded and packed once, by any number of tasks, and read row by row in any order.

    STORE/ENCODING/SHARD.arrow, .json     the rows of one span of a file (`shard`), and what is known of them
    STORE/ENCODING/SHARD-images.pack      images that the documents of the span hold as bytes (`pack`)
    STORE/ENCODING/SHARD-outside.arrow    what the images were that are files of their own (`outside`)
    STORE/ENCODING/SHARD.lock             held by the process that makes the shard
    STORE/ENCODING/index-DATA.arrow       where the rows of a whole data set are (`index`), with its header in .json

ENCODING names all that rows depend on beside the documents; SHARD is a hash of that and of the bytes of the span, and of images
outside if these are others than when its first shard was made; DATA is one of the names of the shards, in order. Nothing here is
ever changed, so whoever finds a file whole may use it.
STORE is a directory that all nodes see, or a URI: then `remote` keeps copies of its files on each node, and reads those.

From files to batches: `spans.cut` divides files, `prepare.prepare_span` makes a shard of each span, `index.write_index` puts
shards together, `order` says which row comes when, and `reader.BatchReader` reads of a global batch what one rank needs.
Free of Ray; who calls `prepare_span` in parallel, and when, is the caller's business.

Traps:
- A file is whole if its .json is there and agrees with it. Only `sealed` writes and checks that.
- Rows must not depend on how many tasks made them: bounds of spans, blocks and windows are constants.
"""
