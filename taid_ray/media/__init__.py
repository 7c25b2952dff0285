"""Images of training rows: where they are kept, what a model's processor makes of them, and which model families are known.

Others use `refs` (ImageRef: an image of a row without its bytes or pixels), `processor` (load_media_processor: the tokens that an
image becomes, its pixels, the model inputs of a batch), `pictures` (Pictures: the same, ahead of its use), `families`, `reader`
(ImageReader: the bytes of an image, wherever they are), `grey` (images that show nothing) and `headers` (whether an image can be
used, without decoding it).

Traps:
- Pixels exist only shortly before a model needs them: a large image may be 31 MB of them.
- A model whose image tokens come without images takes them for words, and computes on: `MediaProcessor.inputs` counts them.
- Models with positions of three coordinates take [B, T] positions without a word, and are wrong then.
- A tile of zeros is padding to some families: an image that shows nothing is a grey one, through the processor.
"""
