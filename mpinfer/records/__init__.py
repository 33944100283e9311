"""Readers and writers of records: the input by offset, the journal, the ordered results, the manifest."""
