"""The procedural sounds and captions that the mini family learned from.

A scene is a clip, its caption, and the truth about it: which events, from when to when. Everything is a
function of (seed, index), so a data set is a range of integers and needs no disk.
"""
