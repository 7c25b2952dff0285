"""Hugging Face models: loading them, taking them apart, the student's first weights, the vocabulary that a pair shares.

Others use `loading` (load_causal_lm, load_tokenizer), `head` (Head, head_of, hidden_states), `self_test` and `isolation`
(tests of a loaded model, on the tokens of `probes`), `image_isolation` and `processors` (the same with images), `lengths` (the
longest rows), `student_init` (build_student), `adapters` (add_lora), `freezing`, `dropout`, `precision`, `saving` (check_saving,
save_model), `vocabulary.Vocabulary`, `pair` (checks of teacher and student together) and `hub`.
Free of Ray and of DeepSpeed.

Traps:
- Some architectures let documents of a packed row see each other, or what follows; `isolation` tests that before one is trusted.
  Bits may be compared where the same tokens are computed in the same shapes only: a mixture of experts multiplies matrices whose
  sizes depend on the tokens.
- transformers chooses the factors of some rotary embeddings by the longest row of a call; `lengths` keeps rows shorter.
- What is trained must be what a reload of the saved model computes: `precision` gives each tensor its dtype before DeepSpeed
  casts all of them.
- An unreachable model hub costs minutes unless `hub.offline_if_unreachable` notices; it sets environment variables and
  constants of other libraries, for the whole process.
"""
