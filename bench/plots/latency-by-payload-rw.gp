# Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.
load "style.gp"
set title "Latency of a call by its params' size, every byte written and read (p50)"
set logscale x 2
set logscale y 10
set xlabel "payload"
set ylabel "µs"
set format x "%.0b %BB"
plot for [i=0:count-1] data index i title columnheader(1) lw 2 lc rgb word(colors, i+1)
