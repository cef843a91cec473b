# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.
load "style.gp"
set title "Latency of a small call by the pause before it (p50)"
set logscale x 10
set logscale y 10
set xlabel "pause (µs)"
set xrange [9:*]
set ylabel "µs"
set xtics ("none" 10, "100" 100, "1000" 1000, "10000" 10000)
plot for [i=0:count-1] data index i title columnheader(1) lw 2 lc rgb word(colors, i+1)
