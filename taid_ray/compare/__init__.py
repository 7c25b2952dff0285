"""Comparison of finished students under equal conditions: what is measured of each, and what their differences mean.

Stands above search/, whose trials train the students.

Traps:
- Nothing here may hold logits of the whole validation set: `measures` adds up, block by block, what is wanted of them.
- A figure is a sum over loss positions divided by their number, per document or over all documents, as in a run's own
  validation; a mean of the documents' means would be another number.
"""
