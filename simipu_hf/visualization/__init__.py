"""Pictures of the data, of what a model learnt, and of a run: static figures and an interactive 3-D page.

`frames.visualize` draws all of them. The functions of the other modules take arrays and return a matplotlib `Figure`
(for the 3-D page HTML), for reports and notebooks.
"""
