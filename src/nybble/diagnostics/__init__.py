"""What is wrong with this machine, what computes rightly on it, and which path each operator should take here."""
