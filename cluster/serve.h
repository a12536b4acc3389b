/* serve.h - `convoke serve`: the coordinator and its doors, from the command line to the last word. */
#ifndef CONVOKE_CLUSTER_SERVE_H
#define CONVOKE_CLUSTER_SERVE_H

/* argv[0] is "convoke serve". Returns the exit code. */
int serve_command(int argc, char **argv);

#endif
