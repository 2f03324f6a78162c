# SPDX-License-Identifier: Apache-2.0
# C simulation, synthesis and export of the core. settings.tcl beside this script says what and for which part.
#   vitis-run --mode hls --tcl csynth.tcl      or      vitis_hls -f csynth.tcl      or      vivado_hls -f csynth.tcl
# DPGEMM_STEPS names the steps: csim, csynth, cosim, export (default: csim csynth export).

source settings.tcl

set steps [list csim csynth export]
if {[info exists env(DPGEMM_STEPS)]} {
  set steps [split $env(DPGEMM_STEPS)]
}
set flags "-std=c++14 -Iinclude"

open_project -reset hls_project
set_top dpgemm
foreach source $kernel_sources {
  add_files $source -cflags $flags
}
add_files -tb $bench_source -cflags $flags
add_files -tb vectors
open_solution -reset solution
set_part $part
create_clock -period $clock_ns -name default
if {$address_bits == 32} {
  # Else each pointer takes two registers, and the processing system has no such addresses.
  config_interface -m_axi_addr64=false
}

if {"csim" in $steps} {
  csim_design -argv vectors
}
if {"csynth" in $steps} {
  csynth_design
}
if {"cosim" in $steps} {
  cosim_design -argv vectors
}
if {"export" in $steps} {
  export_design -format ip_catalog -vendor dynasty-lightning -library hls -ipname dpgemm -version 1.0 -output ip/dpgemm.zip
}
exit
