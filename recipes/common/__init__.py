"""What recipes share: what they are told (`settings`), where a run happens (`run`), what they start from (`models`),
the fit and what surrounds it (`training`), the whole comparison of models that return logits (`experiment`), what they
show and keep (`progress`, `results`, `callbacks`, `fine_tuned`, `pictures`), and what diffusion recipes do
(`diffusion`, `diffusion_config`, `comparison`).

Names are imported from the files: `settings` is read before anything slow is loaded.
"""
