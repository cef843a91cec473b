# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.
# What all plots share. bench/report sets `data` (a block of points per transport, its name first),
# `count` (how many blocks), `colors` (of each) and `output`.
set terminal svg size 800,480 font "sans-serif,13" background rgb "white"
set output output
set key outside right top
set grid xtics ytics lc rgb "#dddddd"
set border 3
set tics nomirror
set style data linespoints
set pointsize 0.6
