"""Images of training rows: where they are kept, what a model's processor makes of them, and which model families are known.

Others use `refs` (ImageRef: an image of a row without its bytes or pixels). Pixels exist only shortly before a model needs them.
"""
