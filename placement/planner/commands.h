/* commands.h - the subcommands of convoke-plan, one function each: argv[0] is the subcommand's name. They print results on
 * stdout, progress on a terminal's stderr, and return a status whose sentence main() prints. */
#ifndef CONVOKE_PLACEMENT_PLANNER_COMMANDS_H
#define CONVOKE_PLACEMENT_PLANNER_COMMANDS_H

#include "proto/status.h"

status command_import(int argc, char **argv);
status command_export(int argc, char **argv);
status command_stats(int argc, char **argv);
status command_show(int argc, char **argv);
status command_solve(int argc, char **argv);
status command_score(int argc, char **argv);
status command_compare(int argc, char **argv);
status command_simulate(int argc, char **argv);
status command_diff(int argc, char **argv);
status command_probe(int argc, char **argv);

#endif
