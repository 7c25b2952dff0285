"""Hugging Face models taken apart: loading, the head, the student's first weights, the vocabulary that a pair shares.

Others use `loading` (load_causal_lm, load_tokenizer, Head, head_of, hidden_states), `student_init` (build_student,
merged_model, add_lora), `vocabulary.Vocabulary`, `pair` (what must hold for teacher and student together) and `hub`.
Free of Ray and of DeepSpeed.

Traps:
- Some architectures let documents of a packed row see each other; `loading` tests that before it trusts one.
- An unreachable model hub costs minutes unless `hub.offline_if_unreachable` notices; it sets environment variables and
  constants of other libraries, for the whole process.
"""
