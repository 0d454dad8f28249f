def needs_column(completions, level, **kwargs):
    return [float(value) for value in level]
