"""Which policies are legal: the choices of every site, fusion, couplings, budgets and what a runtime can load."""
