/* model_settings.h - what the coordinator reads of a checkpoint folder: its name, and how it wishes to be sampled. The workers
 * read everything else. */
#ifndef CONVOKE_CLUSTER_MODEL_SETTINGS_H
#define CONVOKE_CLUSTER_MODEL_SETTINGS_H

#include "cluster/requests_workers.h"

typedef struct {
    char name[256]; /* the folder's */
    sampling_defaults defaults;
    bool has_tokenizer;
} model_settings;

/* generation_config.json may be missing: then temperature 1 and nothing else. */
status model_settings_read(const char *dir, model_settings *out);

#endif
