"""The mathematics of FIPO: log-ratios -> Future-KL -> influence weights. It needs torch and nothing else."""
