"""How good a model is: answers are sampled, scored and averaged, in training and after it."""
