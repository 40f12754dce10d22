"""The proof: an oracle, the rule of acceptance, families of cases, tests through get_kernel."""
