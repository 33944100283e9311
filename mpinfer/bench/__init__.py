"""What parts of mpinfer reach on this machine, beside what else would do."""
