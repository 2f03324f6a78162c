# Runs a vendor script without the vendor's tool:   tclsh vendor_mock.tcl SCRIPT LOG
# Commands and options that the scripts may use are listed; anything else is an error. Each call goes to LOG, one Tcl list a line.

set log [open [lindex $argv 1] w]

# command -> options (an option that takes a value ends in =), number of other arguments: least, most
array set known {
  open_project        {{-reset} 1 1}
  set_top             {{} 1 1}
  add_files           {{-tb -cflags= -norecurse} 1 1}
  open_solution       {{-reset -flow_target=} 1 1}
  set_part            {{} 1 1}
  create_clock        {{-period= -name=} 0 0}
  config_interface    {{-m_axi_addr64=} 0 0}
  csim_design         {{-argv= -clean -O} 0 0}
  csynth_design       {{} 0 0}
  cosim_design        {{-argv= -rtl= -trace_level=} 0 0}
  export_design       {{-format= -vendor= -library= -ipname= -version= -output= -flow=} 0 0}
  create_project      {{-force -part=} 2 2}
  get_board_parts     {{-quiet} 1 1}
  set_property        {{-dict=} 1 3}
  current_project     {{} 0 0}
  update_ip_catalog   {{-rebuild} 0 0}
  create_bd_design    {{} 1 1}
  create_bd_cell      {{-type= -vlnv=} 1 1}
  apply_bd_automation {{-rule= -config=} 1 1}
  get_bd_cells        {{} 1 1}
  get_bd_pins         {{} 1 1}
  get_bd_intf_pins    {{} 1 1}
  connect_bd_net      {{} 2 2}
  assign_bd_address   {{} 0 0}
  validate_bd_design  {{} 0 0}
  save_bd_design      {{} 0 0}
  get_files           {{} 1 1}
  make_wrapper        {{-files= -top} 0 0}
  current_fileset     {{} 0 0}
  update_compile_order {{-fileset=} 0 0}
  launch_runs         {{-to_step= -jobs=} 1 1}
  wait_on_run         {{} 1 1}
  get_runs            {{} 1 1}
  get_property        {{} 2 2}
  open_run            {{} 1 1}
  report_timing_summary {{-file=} 0 0}
  report_utilization  {{-file=} 0 0}
  report_power        {{-file=} 0 0}
}

proc unknown {command args} {
  global known log env
  if {![info exists known($command)]} {
    error "the vendor tool has no command '$command' that this mock knows"
  }
  lassign $known($command) options least most
  set others 0
  for {set i 0} {$i < [llength $args]} {incr i} {
    set word [lindex $args $i]
    if {[string match -* $word] && ![string is double $word]} {
      set name [lindex [split $word =] 0]
      if {[string first = $word] > 0 && "$name=" in $options} {
        continue
      } elseif {$name in $options} {
        continue
      } elseif {"$name=" in $options} {
        incr i
        if {$i >= [llength $args]} {
          error "$command: $name needs a value"
        }
      } else {
        error "$command has no option '$word'"
      }
    } else {
      incr others
    }
  }
  if {$others < $least || $others > $most} {
    error "$command takes $least to $most arguments, not $others: $args"
  }
  puts $log [list $command {*}$args]
  switch $command {
    get_board_parts { if {[info exists env(MOCK_NO_BOARD_FILES)]} { return {} }; return [lindex $args end] }
    get_property { if {[lindex $args 0] eq "PROGRESS"} { if {[info exists env(MOCK_FAILED_RUN)]} { return "41%" }; return "100%" }; return "route_design ERROR" }
    make_wrapper { return wrapper.v }
    launch_runs {
      file mkdir vivado_project/dpgemm.runs/impl_1 vivado_project/dpgemm.gen/sources_1/bd/dpgemm_system/hw_handoff
      close [open vivado_project/dpgemm.runs/impl_1/dpgemm_system_wrapper.bit w]
      close [open vivado_project/dpgemm.gen/sources_1/bd/dpgemm_system/hw_handoff/dpgemm_system.hwh w]
    }
    get_bd_cells - get_bd_pins - get_bd_intf_pins - get_files - get_runs { return [lindex $args end] }
  }
  return ""
}

rename source mock_source
proc source {path} { uplevel #0 [list mock_source $path] }
source [lindex $argv 0]
