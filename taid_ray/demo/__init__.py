"""Demonstrations without a model: what the divergences do where everything can be computed.

`mode_averaging` fits one Gaussian to a mixture of three, `pictures` draws it; `taid-ray demo` prints and draws them.
"""
