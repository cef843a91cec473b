# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.
load "style.gp"
set title "Small calls per second by calls in flight"
set logscale x 2
set xlabel "calls in flight"
set xtics (1, 16, 256)
set ylabel "calls/s"
set yrange [0:*]
set format y "%.0s%c"
plot for [i=0:count-1] data index i title columnheader(1) lw 2 lc rgb word(colors, i+1)
