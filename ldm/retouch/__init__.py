"""What is done to pictures and masks before and after they are painted: fitted, blurred, cut, filled, put together.

Pure functions of Pillow's pictures and of bytes, by the rules of AUTOMATIC1111's web UI; nothing here knows a model of
latent diffusion, and PIL is imported inside functions, so that `import ldm` costs no more than torch.
"""
