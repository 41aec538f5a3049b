"""Audio-alpaca's recipe: from captions to preference pairs (arXiv 2404.09956, section 4.1).

::

    captions ▸ perturb ▸ candidates ▸ scores ▸ pairs ▸ dataset

Every stage is a function of a config, the folders of the stages before it, and a folder of its own, in which
it resumes after an interruption. `pipeline` runs all of them.
"""
