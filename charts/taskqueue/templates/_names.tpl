{{/* The prefix of every name. 40 characters leave room for what follows it. */}}
{{- define "taskqueue.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Takes root, component and settings: a pool may have an account that others made. */}}
{{- define "taskqueue.serviceAccountName" -}}
{{- $account := .root.Values.serviceAccount -}}
{{- if .settings.serviceAccountName -}}
{{- .settings.serviceAccountName -}}
{{- else if $account.name -}}
{{- $account.name -}}
{{- else if $account.create -}}
{{- printf "%s-%s" (include "taskqueue.fullname" .root) .component -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- define "taskqueue.secretName" -}}
{{- default (include "taskqueue.fullname" .) .Values.secrets.existingSecret -}}
{{- end -}}

{{/* What is written beside the image: a digest wins over a tag. */}}
{{- define "taskqueue.image" -}}
{{- with .Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* The labels by which a workload finds its pods; they never change. Takes root, component and pool. */}}
{{- define "taskqueue.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
taskqueue/pool: {{ . }}
{{- end }}
{{- end -}}

{{/* The labels of an object. Takes what `taskqueue.selector` takes. */}}
{{- define "taskqueue.labels" -}}
{{ include "taskqueue.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The annotations of an object, as a line of its metadata, if there are any. Takes root and own. */}}
{{- define "taskqueue.annotations" -}}
{{- with merge (deepCopy (default dict .own)) .root.Values.commonAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Checks of kube-score that a workload is not to be held to, each with its reason. */}}
{{- define "taskqueue.answers" -}}
{{- $answers := list -}}
{{- /* A tag of ours is never moved, and a digest can be set: nodes need not ask a registry at each start. */ -}}
{{- if ne .Values.image.pullPolicy "Always" }}{{ $answers = append $answers "container-image-pull-policy" }}{{ end -}}
{{- /* Off by default: a policy that does not know where a cluster's DNS is cuts every pod off. */ -}}
{{- if not .Values.networkPolicy.enabled }}{{ $answers = append $answers "pod-networkpolicy" }}{{ end -}}
{{- /* The platform chooses them where they are not set. */ -}}
{{- if kindIs "invalid" .Values.podSecurityContext.runAsUser -}}
{{- $answers = append $answers "container-security-context-user-group-id" -}}
{{- end -}}
{{- with $answers -}}
kube-score/ignore: {{ join "," . }}
{{- end -}}
{{- end -}}

{{/* Every pool of workers with what it inherits, as JSON: the one place where this is decided. */}}
{{- define "taskqueue.pools" -}}
{{- $pools := dict -}}
{{- range $name, $own := .Values.workers -}}
{{- if $own -}}
{{- $_ := set $pools $name (mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy $own)) -}}
{{- end -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{/* The queues of all pools, sorted, with commas between them: what the API accepts and the relay looks after. */}}
{{- define "taskqueue.queues" -}}
{{- $queues := list -}}
{{- range (include "taskqueue.pools" . | fromJson) -}}
{{- $queues = concat $queues .queues -}}
{{- end -}}
{{- /* The first one is where tasks go that name none. */ -}}
{{- if has "default" $queues -}}
{{- $queues = prepend (without $queues "default" | uniq | sortAlpha) "default" -}}
{{- else -}}
{{- $queues = $queues | uniq | sortAlpha -}}
{{- end -}}
{{- join "," $queues -}}
{{- end -}}
