"""The frozen teacher in one process: model, payload, wire format, and what a student worker needs of any teacher.

Others use `protocol` (TeacherClient, TeacherInfo), `payload` (TeacherOutput and what a payload costs), `local.LocalTeacher`
and `model.TeacherModel`; `teacher.pool` has the same teacher as Ray actors, `teacher.cache` its outputs kept. Inside, pool
stands above cache, cache above local, model, its parts (fingerprint, groups, pictures), protocol, transfer, payload and wire.

Traps:
- Answers and requests carry a checksum (`wire.digest`); what arrives damaged is asked for three times at most.
- A payload is a dict of tensors; `TeacherOutput.target` turns it into what the chunked loss compares with. Approximate
  payloads are validated with the same payload, so the KL of `topk` is between buckets.
- A model takes image tokens without an image for words, silently. So a request is refused unless each has its own
  (`pictures.check_pictures`), and what lies behind a row's last loss position, where an image may be cut, is padding.
- What a teacher computes together follows from the request alone. Requests are never merged, so that all replicas and all
  restarts return the same bits.
"""
