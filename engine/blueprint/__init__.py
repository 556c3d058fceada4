"""What a model is made of: its own code, run on tensors that have a shape and no values.

Importing torch and transformers takes seconds, and `engine plan` has one. So the files of the
installed transformers are run here by themselves, with stand-ins for everything that they import.
"""
