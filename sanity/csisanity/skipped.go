package csisanity

// Skipped are the specs that do not run, by the reason why.
var Skipped = byName(map[string][]string{
	"the suite itself has it switched off (XIt): it deletes volumes between two pages": {
		"Controller Service [Controller Server] ListVolumes pagination should detect volumes added between pages and accept tokens when the last volume from a page is deleted",
	},
	"no snapshots yet: a manifest of versions is a later step": {
		"Controller Service [Controller Server] CreateVolume should create volume from an existing source snapshot",
		"Controller Service [Controller Server] CreateVolume should fail when the volume source snapshot is not found",
		"ListSnapshots [Controller Server] should return appropriate values (no optional values added)",
		"ListSnapshots [Controller Server] should return snapshots that match the specified snapshot id",
		"ListSnapshots [Controller Server] should return empty when the specified snapshot id does not exist",
		"ListSnapshots [Controller Server] should return snapshots that match the specified source volume id",
		"ListSnapshots [Controller Server] should return empty when the specified source volume id does not exist",
		"ListSnapshots [Controller Server] check the presence of new snapshots in the snapshot list",
		"ListSnapshots [Controller Server] should return next token when a limited number of entries are requested",
		"GetSnapshot [Controller Server] should return an error",
		"GetSnapshot [Controller Server] should return snapshot that match the specified snapshot id",
		"GetSnapshot [Controller Server] should return an error when the specified snapshot id does not exist",
		"DeleteSnapshot [Controller Server] should fail when no snapshot id is provided",
		"DeleteSnapshot [Controller Server] should succeed when an invalid snapshot id is used",
		"DeleteSnapshot [Controller Server] should return appropriate values (no optional values added)",
		"CreateSnapshot [Controller Server] should fail when no name is provided",
		"CreateSnapshot [Controller Server] should fail when no source volume id is provided",
		"CreateSnapshot [Controller Server] should succeed when requesting to create a snapshot with already existing name and same source volume ID",
		"CreateSnapshot [Controller Server] should fail when requesting to create a snapshot with already existing name and different source volume ID",
		"CreateSnapshot [Controller Server] should succeed when creating snapshot with maximum-length name",
		"CreateSnapshot [Controller Server] should succeed when creating a snapshot with accessibility requirements",
	},
	"no clones yet: they come with snapshots": {
		"Controller Service [Controller Server] CreateVolume should create volume from an existing source volume",
		"Controller Service [Controller Server] CreateVolume should fail when the volume source volume is not found",
	},
	"no VolumeAttributesClass yet: cache policy is not changed live": {
		"Controller Service [Controller Server] CreateVolume should create volume with a volume attribute class",
		"Controller Service [Controller Server] CreateVolume should not create volume with an invalid volume attribute class",
		"ModifyVolume [Controller Server] should fail if no volume id is given",
		"ModifyVolume [Controller Server] should fail if volume does not exist",
		"ModifyVolume [Controller Server] should fail if specified mutable parameters are not supported by the volume",
		"ModifyVolume [Controller Server] should modify a volume created without a volume attribute class",
		"ModifyVolume [Controller Server] should modify a volume created with a volume attribute class",
		"ModifyVolume [Controller Server] should fail to modify a volume created with a volume attribute class if new mutable parameters are not supported by volume",
	},
	"nothing is attached: CSIDriver has attachRequired: false": {
		"Controller Service [Controller Server] ControllerPublishVolume should fail when no volume id is provided",
		"Controller Service [Controller Server] ControllerPublishVolume should fail when no node id is provided",
		"Controller Service [Controller Server] ControllerPublishVolume should fail when no volume capability is provided",
		"Controller Service [Controller Server] ControllerPublishVolume should fail when publishing more volumes than the node max attach limit",
		"Controller Service [Controller Server] ControllerPublishVolume should fail when the volume does not exist",
		"Controller Service [Controller Server] ControllerPublishVolume should fail when the node does not exist",
		"Controller Service [Controller Server] ControllerPublishVolume should fail when the volume is already published but is incompatible",
		"Controller Service [Controller Server] volume lifecycle should work",
		"Controller Service [Controller Server] volume lifecycle should be idempotent",
		"Controller Service [Controller Server] ControllerUnpublishVolume should fail when no volume id is provided",
	},
	"a dataset has the size it has; quotas are a later step": {
		"ExpandVolume [Controller Server] should fail if no volume id is given",
		"ExpandVolume [Controller Server] should fail if no capacity range is given",
		"ExpandVolume [Controller Server] should work",
		"Node Service NodeExpandVolume should fail when no volume id is provided",
		"Node Service NodeExpandVolume should fail when no volume path is provided",
		"Node Service NodeExpandVolume should fail when volume is not found",
		"Node Service NodeExpandVolume should work if node-expand is called after node-publish",
	},
	"no group snapshots yet: they come with snapshots": {
		"GroupController Service [GroupController Server] GroupControllerGetCapabilities should return appropriate capabilities",
		"GroupController Service [GroupController VolumeGroupSnapshots] CreateVolumeGroupSnapshot should fail when no name is provided",
		"GroupController Service [GroupController VolumeGroupSnapshots] GetVolumeGroupSnapshot should fail when no volume id is provided",
		"GroupController Service [GroupController VolumeGroupSnapshots] GetVolumeGroupSnapshot should fail when an invalid volume id is used",
		"GroupController Service [GroupController VolumeGroupSnapshots] DeleteVolumeGroupSnapshot should fail when no volume id is provided",
		"GroupController Service [GroupController VolumeGroupSnapshots] DeleteVolumeGroupSnapshot should succeed when an invalid volume id is used",
	},
})

func byName(reasons map[string][]string) map[string]string {
	names := map[string]string{}
	for reason, list := range reasons {
		for _, name := range list {
			names[name] = reason
		}
	}
	return names
}
