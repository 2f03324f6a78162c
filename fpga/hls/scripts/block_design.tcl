# SPDX-License-Identifier: Apache-2.0
# From the exported core to a bitstream and its .hwh.   vivado -mode batch -source block_design.tcl

source settings.tcl

create_project -force dpgemm vivado_project -part $part
if {[llength [get_board_parts -quiet $board_part]] > 0} {
  set_property board_part $board_part [current_project]
} else {
  error "the board files of $board_part are not installed: without them the processing system's memory is not set up"
}
set_property ip_repo_paths [file normalize ip] [current_project]
update_ip_catalog -rebuild

create_bd_design dpgemm_system
create_bd_cell -type ip -vlnv $processor_vlnv ps
apply_bd_automation -rule $processor_rule -config $processor_config [get_bd_cells ps]
set_property -dict $processor_settings [get_bd_cells ps]
create_bd_cell -type ip -vlnv dynasty-lightning:hls:dpgemm:1.0 core

apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config [list Master $control_master Clk Auto] [get_bd_intf_pins core/s_axi_control]
foreach {bundle port} $memory_ports {
  apply_bd_automation -rule xilinx.com:bd_rule:axi4 -config [list Master /core/m_axi_$bundle Clk Auto] [get_bd_intf_pins ps/$port]
}
connect_bd_net [get_bd_pins core/interrupt] [get_bd_pins ps/$interrupt_pin]
assign_bd_address
validate_bd_design
save_bd_design

set design [get_files dpgemm_system.bd]
add_files -norecurse [make_wrapper -files $design -top]
set_property top dpgemm_system_wrapper [current_fileset]
update_compile_order -fileset sources_1
launch_runs impl_1 -to_step write_bitstream -jobs 2
wait_on_run impl_1
if {[get_property PROGRESS [get_runs impl_1]] ne "100%"} {
  error "implementation did not end: [get_property STATUS [get_runs impl_1]]"
}

# PYNQ wants both files under one name.
file mkdir overlay
file copy -force [glob vivado_project/dpgemm.runs/impl_1/*.bit] overlay/dpgemm.bit
file copy -force [lindex [glob vivado_project/dpgemm.*/sources_1/bd/dpgemm_system/hw_handoff/dpgemm_system.hwh] 0] overlay/dpgemm.hwh
open_run impl_1
report_timing_summary -file overlay/timing.rpt
report_utilization -file overlay/utilization.rpt
report_power -file overlay/power.rpt
