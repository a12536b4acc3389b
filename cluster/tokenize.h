/* tokenize.h - the command `convoke tokenize`: lines of text or JSON in, lines of token ids out, or the other way. */
#ifndef CONVOKE_CLUSTER_TOKENIZE_H
#define CONVOKE_CLUSTER_TOKENIZE_H

/* argv[0] is "convoke tokenize". Returns the exit code; what goes wrong is one sentence on stderr. */
int tokenize_command(int argc, char **argv);

#endif
