"""Demonstrations without a model: what the divergences do where everything can be computed, and drawn scenes to ask about.

`mode_averaging` fits one Gaussian to a mixture of three, `pictures` draws it; `taid-ray demo` prints and draws them. `scenes`
draws scenes with questions and their answers, `contact_sheet` shows them with answers of models; `taid-ray quickstart --vision`
uses both.
"""
