/* generate.h - `convoke generate`: a prompt in, text out as it comes, from a running server or one of its own. */
#ifndef CONVOKE_CLUSTER_GENERATE_H
#define CONVOKE_CLUSTER_GENERATE_H

/* argv[0] is "convoke generate". Returns the exit code: 130 after Ctrl-C. */
int generate_command(int argc, char **argv);

#endif
